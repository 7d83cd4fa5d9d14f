"""What the user passed: arguments, leaves, modules, and the jit around a function."""
