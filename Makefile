.PHONY: quality style test newest

quality:
	ruff check .
	ruff format --check .
	lint-imports setup.cfg
	python .ci/shape

style:
	ruff check --fix .
	ruff format .

test:
	python -m pytest -n 2

# The suite with the newest transformers that the package registry has. It reports and always succeeds.
newest:
	.ci/newest
