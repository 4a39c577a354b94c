"""The table of tools/mutate.py follows the code and the tests."""

from helpers import METHODS

from tools import mutate


def test_every_mutation_is_of_a_text_that_occurs_once_and_names_tests_that_exist():
    unchanged, mutations = mutate.jobs_of("")  # SystemExit names those that do not
    assert len(mutations) >= 60 and all(job.tests and job.old != job.new for job in mutations)
    assert {job.file for job in mutations} >= {f"{m}.py" for m in METHODS} | {"common.py", "run.py", "data.py", "cli.py"}
    assert {test for job in mutations for test in job.tests} == {test for job in unchanged for test in job.tests}
    assert [job.name for job in mutate.jobs_of("lambda squared")[1]] == ["pare.py: lambda squared"]
