"""The pushing end of weight publication."""
