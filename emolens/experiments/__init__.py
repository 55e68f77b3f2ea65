"""One file an experiment. Each names its primary row before it is run and returns tidy rows with their controls."""
