"""docs/proof-cuda.md says what the tests of this folder check, no more and no less."""

import cuda_matrix


def test_the_document_has_the_table_of_the_tests():
    assert cuda_matrix.documented() == cuda_matrix.dry_run(), f"run python {cuda_matrix.__file__}"
