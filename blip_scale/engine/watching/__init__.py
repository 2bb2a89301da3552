"""What a run tells about itself: metrics, heartbeat, records and alarms."""
