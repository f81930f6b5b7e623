"""Math on arrays: no parameters, no modules."""
