"""The HTTP server: a thin shell over the engine's loop, behind the APIs that clients know."""
