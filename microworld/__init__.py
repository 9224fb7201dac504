"""A small synthetic world: questions whose answers a program can score exactly."""
