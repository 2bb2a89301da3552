"""Reports of a run: metrics, heartbeat, records and alarms."""
