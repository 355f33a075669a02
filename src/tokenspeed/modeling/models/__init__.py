"""Model definitions: the equations, their boundaries and their weight names."""
