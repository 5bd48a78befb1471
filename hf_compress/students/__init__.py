"""Students: out of the teacher's own layers, or of the teacher's design at another width."""
