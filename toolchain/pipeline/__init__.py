"""A recipe carried out: a checked job, the run's folder, the stages, and what they depend on."""
