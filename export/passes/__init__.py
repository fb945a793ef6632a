"""Graph passes, one file each: ``apply(model) -> None`` changes an exported graph in place."""
