"""What a person sees; the only place that knows a terminal."""
