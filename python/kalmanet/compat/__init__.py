"""Stand-ins for other packages' module paths; each is used by importing it."""
