"""What people add: one table per kind, one entry per addition. An entry says its name, its function and what it needs;
recipe type, doctor, report, terminal and reference follow from it. Nothing heavy is imported here: an entry of the package
names its function as 'module:function', one of a user's may give the function itself (`rlhf_ray.register_*`).

May import: errors.
"""
