"""What works with which family: a table made by a run, family by case by technique, and kept beside this module.

    for name, record in run(sorted(ZOO)[:2], jobs=2):
        print(record.cells["generate"]["FastV"])

`vlmrewrite families` prints the kept table and makes it anew.
"""
