"""What mkdocs runs: underscores stay underscores, since docstrings write θ_t and h_{t+1}; emphasis is written with asterisks."""

from markdown.extensions import Extension
from markdown.inlinepatterns import SimpleTextInlineProcessor
from mkdocs.plugins import event_priority


class PlainUnderscores(Extension):
    def extendMarkdown(self, md):
        md.inlinePatterns.register(
            SimpleTextInlineProcessor("(_+)"), "plain_underscores", 65
        )  # after code and links, before emphasis


@event_priority(100)  # before mkdocstrings takes the list over
def on_config(config):
    config.markdown_extensions.append(PlainUnderscores())
    return config
