"""Files of many formats, here and in buckets, as records."""
