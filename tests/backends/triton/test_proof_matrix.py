"""docs/proof-triton.md says what the tests prove, no more and no less."""

import proof_matrix


def test_the_document_has_the_table_of_the_tests():
    assert proof_matrix.documented() == proof_matrix.table(), f"run python {proof_matrix.__file__}"


def test_every_feature_is_proven_as_compiled_code():
    """For both generations, forward in fp16 and bf16 or at least in one of them."""
    for line in proof_matrix.table().splitlines()[2:]:
        assert "80 90" in line, line
