def choose(study, step, cuts, routing):
    raise AssertionError("to come")
