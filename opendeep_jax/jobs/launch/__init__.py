"""Jobs on clusters and this machine."""
