"""The published instruction and knowledge sets, and how each row becomes an instruction."""
