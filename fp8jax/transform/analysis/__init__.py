"""What a program computes: values, passes of a step, roles of products."""
