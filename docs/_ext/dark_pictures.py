"""Sphinx extension: beside a picture x.png that has a twin x-dark.png, the twin, for dark pages.

The pages name the light one only, as plain Markdown, so that they read well without Sphinx too.
"""

from pathlib import Path

from docutils import nodes
from sphinx.transforms import SphinxTransform


class DarkTwins(SphinxTransform):
    default_priority = 200  # before Sphinx copies the files of pictures

    def apply(self, **options):
        folder = Path(self.env.doc2path(self.env.docname)).parent
        for light in list(self.document.findall(nodes.image)):
            uri = light["uri"].removesuffix(".png") + "-dark.png"
            if (folder / uri).is_file():
                dark = light.deepcopy()
                dark["uri"] = uri
                light["classes"].append("only-light")
                dark["classes"].append("only-dark")
                light.parent.insert(light.parent.index(light) + 1, dark)


def setup(app):
    app.add_transform(DarkTwins)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
