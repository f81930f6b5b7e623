"""Health checks, recovery, replay, watchdog and fault injection."""
