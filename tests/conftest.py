"""While the tests run, every annotated shape and type of the package is checked: jaxtyping and beartype."""

from hypothesis import settings
from jaxtyping import install_import_hook

CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"  # an int is a float as well

install_import_hook("bigmodel", CHECKER)  # acts on imports after this line, so it must come first
settings.register_profile("bigmodel", deadline=None, print_blob=True)  # machines differ in speed, not in truth
settings.load_profile("bigmodel")
