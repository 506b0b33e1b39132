"""HTML pages of one file: their templates."""

from jinja2 import Environment, PackageLoader, StrictUndefined, Template


def page_template(package: str, name: str) -> Template:
    """A template below `<package>/templates/`; what it is given is escaped, and a name that it lacks is an error."""
    environment = Environment(
        loader=PackageLoader(package),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
