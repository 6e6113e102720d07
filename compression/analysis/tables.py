"""placeholder"""


def analysis_tables(study):
    return {}
