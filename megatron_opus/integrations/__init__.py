"""OPUS inside other people's training loops, which stay as they are."""
