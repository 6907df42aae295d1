"""What people's images come in, one reader a format; each gives a `Collection` to write."""
