"""One file an algorithm: how advantages are formed, its loss, its update."""
