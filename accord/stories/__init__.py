"""A corpus that accord makes itself: small stories with a known grammar, whose properties and entropy are known exactly."""
