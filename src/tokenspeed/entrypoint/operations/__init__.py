"""The operations port: owns what an operator sees of a running server; never generates a token."""
