"""OpenStack: the only importer of openstacksdk and of aiohttp's client. Says what was answered; decides nothing."""
