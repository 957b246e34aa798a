"""Every drafting method on the same terms: suites of prompts, raw measurements, and reports made from those alone."""
