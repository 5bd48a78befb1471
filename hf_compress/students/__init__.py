"""Students: out of the teacher's own layers, of its most important parts, or of its design at another width."""
