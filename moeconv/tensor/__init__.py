"""Arrays with named axes: dtypes, what is done to values and places, and how it is undone."""
