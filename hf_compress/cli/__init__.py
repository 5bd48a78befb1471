"""The command `hf-compress`: one short file a command, none of which loads torch before it has to."""
