"""What requests of each API may hold, and their conversion to what the engine is asked."""
