def results(recipe, runs):
    return ""
