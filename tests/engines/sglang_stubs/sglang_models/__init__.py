"""The one architecture that the tests serve: SGLang imports all of its own where no such package is named, which takes
longer than everything else at start."""
