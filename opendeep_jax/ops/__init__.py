"""Maths on arrays: no parameters, no modules."""
