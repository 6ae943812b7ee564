"""The HTTP endpoint: an application over one engine, kept warm in a thread of its own."""
