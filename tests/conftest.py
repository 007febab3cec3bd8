"""While the tests run, every annotated shape and type of the package is checked: jaxtyping and beartype."""

from hypothesis import settings
from jaxtyping import install_import_hook

install_import_hook("bigmodel", "beartype.beartype")  # acts on imports after this line, so it must come first
settings.register_profile("bigmodel", deadline=None, print_blob=True)  # machines differ in speed, not in truth
settings.load_profile("bigmodel")
