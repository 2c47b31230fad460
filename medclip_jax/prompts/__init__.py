"""Sentences about healthy and abnormal images become token ids with slots for learnable context.

The words come from templates, word lists, or an ontology with synonyms.
"""
