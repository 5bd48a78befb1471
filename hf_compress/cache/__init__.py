"""The teacher on disk: what it showed for each example, stored once, so that training loads no teacher."""
