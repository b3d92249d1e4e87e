from fpgm.report.command import main

main()
