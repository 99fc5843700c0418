"""Two result folders on the same items -> what differs."""
