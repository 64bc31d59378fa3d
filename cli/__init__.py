"""The `corral` command: click commands, one file each, loaded when named; they ask the layers below and print."""
