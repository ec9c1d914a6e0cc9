"""One package per operation: a torch reference that is the specification, and faster forms of it."""
