"""The test suite: unit, golden, integration, fault and bench, and the private servers they run on."""
