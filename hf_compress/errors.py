"""What can go wrong, as classes a script can catch.

    CompressionError (a ValueError)
    |-- ArgumentError      a flag or argument, or two that contradict each other
    |-- LayerDropError     a strategy, a number of layers, or a model whose layers cannot be dropped
    |-- LayerMapError      student and teacher layers that cannot be paired
    |-- LossError          a loss asked for something this model or batch does not have
    |-- TeacherError       the teacher is missing, does not fit the student, or gives NaN
    |-- CacheError         the teacher on disk is unfinished, damaged, foreign, or does not hold what is asked
    |-- DataError          the data is empty, endless, or cannot be told from padding
    +-- ScriptError        `hf-compress run` cannot find or start the script

All are raised before work starts where that can be known, and say what was found, what was expected and what to do.
"""


class CompressionError(ValueError):
    """Base of every error that hf_compress raises on purpose."""


class ArgumentError(CompressionError):
    """A flag or argument is unknown, malformed, or contradicts another."""


class LayerDropError(CompressionError):
    """The layers asked for cannot be dropped from this model."""


class LayerMapError(CompressionError):
    """Student and teacher layers cannot be paired as asked."""


class LossError(CompressionError):
    """A loss asks for something that the model or the batch does not have."""


class TeacherError(CompressionError):
    """The teacher is missing, does not fit the student, or gives values that are not finite."""


class CacheError(CompressionError):
    """The teacher on disk is unfinished, damaged, another teacher's, or does not hold what is asked."""


class DataError(CompressionError):
    """The data set is empty, has no length, or its examples cannot be told from padding."""


class ScriptError(CompressionError):
    """`hf-compress run` cannot find the script, or what it found is no script."""
