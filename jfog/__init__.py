"""jfog: decentralized training for JAX."""
